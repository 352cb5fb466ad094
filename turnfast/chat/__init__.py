"""Messages to token ids and sampled ids to text, through a chat template or a renderer."""
