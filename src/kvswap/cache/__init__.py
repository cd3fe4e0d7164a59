"""When things move: rolling buffer, reuse buffer, prefetch, session."""
