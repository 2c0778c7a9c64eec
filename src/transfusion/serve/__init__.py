"""The server: OpenAI-compatible endpoints, the events of the engine, and the page."""
