"""The evidence: one bench per operation or job, and the results it left in results/."""
