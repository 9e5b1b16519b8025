"""A run of `diffad predict`: it scores files of any number in constant memory, and writes what it finds."""
