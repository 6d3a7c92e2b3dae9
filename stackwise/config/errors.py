"""The one error every faulty configuration ends in."""


class ConfigError(ValueError):
    """A configuration that cannot be used; the message lists every fault and what is accepted."""
