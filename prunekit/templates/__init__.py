"""What `prunekit new` writes: for every kind of plug-in one method and its test.

They are modules like any other, checked and tested as such. In the copy, `Template` is the name of the class,
`template` that of the plug-in, and `prunekit.templates.KIND` that of the module.
"""
