"""MetaLM: the folder is shaped as its Hub repository; import the classes from its modules."""
