"""What a Flextron checkpoint holds, and how two of them differ, read from the files without building a model."""
