"""Training: stages, the one loop that runs them, the activation cache, the public trainers."""
