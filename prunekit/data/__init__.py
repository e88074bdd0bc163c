"""Text and questions, from their source to windows of token ids."""
