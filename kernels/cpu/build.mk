# make kernels [ISA=avx2]: the CPU kernels where they are loaded from, with pyproject.toml's flags. A unit is compiled anew only
# when these or a file that it includes change.

ISA ?= portable $(if $(filter x86_64,$(shell uname -m)),avx2 avx512 avx512vnni)
SUFFIX := $(shell $(PYTHON) -c 'import sysconfig; print(sysconfig.get_config_var("EXT_SUFFIX"))')
UNITS := $(notdir $(basename $(wildcard kernels/cpu/*.cpp)))
READ = import tomllib; modules = tomllib.load(open("pyproject.toml", "rb"))["tool"]["setuptools"]["ext-modules"]; \
	print(*[flag for module in modules if module["name"].endswith(".cpu_$1") for flag in module["extra-compile-args"]])
.DELETE_ON_ERROR:
.PHONY: all force

all: $(ISA:%=kernels/cpu_%$(SUFFIX))

define build
FLAGS_$1 := $$(shell $(PYTHON) -c '$(READ)')
build/kernels/$1/flags: force
	@mkdir -p $$(@D); echo '$$(FLAGS_$1)' | cmp -s - $$@ || echo '$$(FLAGS_$1)' >$$@
build/kernels/$1/%.o: kernels/cpu/%.cpp build/kernels/$1/flags
	$(CXX) $$(FLAGS_$1) -fPIC -MMD -MP -c $$< -o $$@
kernels/cpu_$1$(SUFFIX): $(UNITS:%=build/kernels/$1/%.o)
	$(CXX) -shared -pthread $$^ -o $$@
endef
$(foreach isa,$(ISA),$(eval $(call build,$(isa))))
-include $(foreach isa,$(ISA),$(UNITS:%=build/kernels/$(isa)/%.d))
