"""The vision-language models that encode the observation. The home of transformers."""
