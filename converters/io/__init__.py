"""Reading and writing files: positioned reads, atomic publishing, JSON, Protocol Buffers."""

__all__ = ["json", "protobuf", "publishing", "reading", "sstable"]
