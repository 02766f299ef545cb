"""Serving and running. Never imports `train`: a robot computer has no training stack."""
