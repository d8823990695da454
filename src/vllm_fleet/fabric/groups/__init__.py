"""Groups of workers that communicate: how they meet, and what they do together. docs/groups.md walks through it."""
