"""Reads images: which files and rows there are, here or in a store, and the pixels of each, without torch."""
