"""Which of several fitting instances gets a request. Pure: one policy per file."""
