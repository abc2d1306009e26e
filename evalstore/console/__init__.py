"""The operator's pages at `/console` of the HTTP service."""
