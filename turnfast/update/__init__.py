"""One policy update: gradient, optimizer, critic and reference policy."""
