"""Where entries lie: one file a layout."""
