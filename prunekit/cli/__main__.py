"""python -m prunekit.cli"""

from prunekit.cli.main import main

main()
