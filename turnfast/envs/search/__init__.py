"""Questions and passages from files or Hugging Face datasets, with a search tool."""
