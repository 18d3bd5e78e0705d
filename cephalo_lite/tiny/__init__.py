"""The embedded default: a small world of pictures with known answers, and tiny models for it."""
