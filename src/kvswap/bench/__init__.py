"""What measurements are made of: readers, documents, shapes, replayed selections, records."""
