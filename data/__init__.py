"""Prepared click data: schema, preparation, memory-mapped shards, batches."""
