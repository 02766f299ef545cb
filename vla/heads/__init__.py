"""Action heads: what the expert's tokens mean, how they are corrupted, scored and sampled."""
