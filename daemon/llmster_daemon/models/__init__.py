"""Model files: the store on disk, GGUF metadata, import and the sample model."""
