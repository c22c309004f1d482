"""Whether rank files are what they should be: headers, checksums, the source, a real vLLM."""
