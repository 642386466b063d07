"""The OpenAI API over the decode engine: requests, a scheduler of rows, replies."""
