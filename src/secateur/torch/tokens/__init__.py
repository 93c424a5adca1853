"""A model that drops or merges tokens on its way, by hooks on its blocks: no model class is edited."""
