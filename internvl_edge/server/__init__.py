"""The HTTP server: the OpenAI form of chat completions over one bundle, a page for people, metrics and limits."""
