"""What every test shares: hypothesis without deadlines, which would measure the machine's load and not the code."""

from hypothesis import settings

settings.register_profile("megabts", deadline=None, print_blob=True)
settings.load_profile("megabts")
