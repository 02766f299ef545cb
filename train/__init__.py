"""Learning: data, fine-tuning, statistics, reports."""
