"""Inference with everything constant computed once: static buffers, fused weights, tables, one recorded loop."""
