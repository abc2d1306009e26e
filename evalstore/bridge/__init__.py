"""The bridge from an old platform's Redis pub/sub to the queue."""
