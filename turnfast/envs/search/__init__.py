"""Questions and passages from files or the Hugging Face hub, with a search tool."""
