"""Hugging Face folders and plain safetensors files, both ways."""
