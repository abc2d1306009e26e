"""The process that stores."""
