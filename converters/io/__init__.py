"""Reading and writing files: positioned reads, atomic publishing, JSON, Protocol Buffers."""
