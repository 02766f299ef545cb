"""Action tokenizers: chunks of actions <-> short sequences of ids, for a model that predicts tokens."""
