"""Saving trees to safetensors, npz, MXNet and Orbax files, and loading them back by name."""
