# The front door of the checkout. Every target works from a fresh clone.
PY := .venv/bin/python

.PHONY: help setup demo test soak check bench nested-kvm nested-vfio qemu-versions guest-kernels cloud-image guest-suite docker-clients compare-docker docs clean

help:
	@echo 'make setup   system packages, .venv and the native build (quick when up to date)'
	@echo 'make demo    run a real image, made from the packages of this host'
	@echo 'make check   format, lint, types, import rules, unit tests (under 90 s)'
	@echo 'make test    the whole suite'
	@echo 'make soak    the same with more of what is long: every point of a kill, 2,000 containers'
	@echo 'make bench   hutch and its peers side by side'
	@echo 'make nested-kvm   virtual machines on KVM, in a machine that emulates it'
	@echo 'make nested-vfio  devices given to machines, in one that emulates an IOMMU'
	@echo 'make qemu-versions   tests of machines with other versions of QEMU'
	@echo 'make guest-kernels   the same with other kernels in the guests'
	@echo 'make cloud-image   a cloud image with cloud-init, started twice and reached by SSH'
	@echo 'make guest-suite  tests on a kernel with cgroup v2, quotas and fs-verity, in a machine'
	@echo 'make docker-clients  tests of the Docker API with real clients'
	@echo 'make compare-docker  one scenario against Debian'"'"'s dockerd and against hutch'
	@echo 'make docs    the reference pages made from the code'

setup:
	@sh scripts/setup

demo: setup
	@$(PY) scripts/demo.py

test: setup
	@$(PY) scripts/run_tests.py

soak: setup
	@HUTCH_SOAK=1 $(PY) scripts/run_tests.py

check: setup
	@$(PY) scripts/check.py

bench: setup
	@$(PY) -m bench.run $(ARGS)

nested-kvm: setup
	@$(PY) -m scripts.nested_kvm

nested-vfio: setup
	@$(PY) -m scripts.nested_vfio

qemu-versions: setup
	@$(PY) -m scripts.versions qemu $(ARGS)

guest-kernels: setup
	@$(PY) -m scripts.versions kernels $(ARGS)

cloud-image: setup
	@$(PY) -m scripts.cloud_image

guest-suite: setup
	@$(PY) scripts/guest_suite.py $(ARGS)

docker-clients: setup
	@$(PY) -m scripts.docker_clients $(ARGS)

compare-docker: setup
	@$(PY) -m scripts.compare_docker $(ARGS)

docs: setup
	@$(PY) scripts/docs.py

clean:
	rm -rf build dist native/build .mypy_cache .ruff_cache .pytest_cache .hypothesis
