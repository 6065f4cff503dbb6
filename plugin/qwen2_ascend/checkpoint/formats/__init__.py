"""File formats: where each tensor's bytes lie. Nothing outside this folder knows a file layout."""
