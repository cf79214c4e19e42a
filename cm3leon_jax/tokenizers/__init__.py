"""Text and image tokenizers, seen from the host; import the module that you need."""
