"""HTTP/1.1 on asyncio protocols, both sides. Knows no OpenAI and no membership."""
