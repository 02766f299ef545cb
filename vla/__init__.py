"""The policy: observation -> action chunk. Knows neither robots nor data sets."""
