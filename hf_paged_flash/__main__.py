"""`python -m hf_paged_flash`, the same as the command `hf-paged-flash`."""

from hf_paged_flash.cli import main

if __name__ == "__main__":
    main()
