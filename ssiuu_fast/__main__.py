import sys

from ssiuu_fast.cli import main

sys.exit(main())
