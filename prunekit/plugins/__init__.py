"""What a plug-in promises, by kind, and how plug-ins are found."""
