# GPU cubins: csrc/device/NAME_sm90a.cu -> flashmoe/kernels/cubin/NAME_sm90a.cubin.
#
# Sets FLASHMOE_CUBINS (the files), FLASHMOE_NVCC_VERSION, and FLASHMOE_NO_CUBINS_WHY where there are
# none; FLASHMOE_NVSHMEM_VERSION of the headers that the flavour `nvshmem` is compiled with, or
# FLASHMOE_NO_NVSHMEM_WHY where that flavour is left out.  Needs no GPU and no driver.
option(FLASHMOE_LINEINFO "Source lines in the cubins, for ncu and compute-sanitizer" OFF)

file(GLOB device_sources CONFIGURE_DEPENDS "${CMAKE_CURRENT_SOURCE_DIR}/csrc/device/*_sm90a.cu")
file(GLOB nvcc_probe_source "${CMAKE_CURRENT_SOURCE_DIR}/cmake/probe.cu")

# `path` runs, is of release 13, and turns a small kernel into an sm_90a cubin: a compiler whose parts
# are missing or do not fit each other answers --version all the same.
function(flashmoe_try_nvcc path version_out why_out)
  set(${version_out} "" PARENT_SCOPE)
  execute_process(
    COMMAND "${path}" --version
    OUTPUT_VARIABLE said
    ERROR_VARIABLE said_err
    RESULT_VARIABLE failed)
  if(failed)
    set(${why_out} "${path} does not run: ${failed}" PARENT_SCOPE)
    return()
  endif()
  if(NOT said MATCHES "release 13\\.[0-9]+, V([0-9.]+)")
    set(${why_out} "${path} is not of CUDA 13" PARENT_SCOPE)
    return()
  endif()
  set(version "${CMAKE_MATCH_1}")
  execute_process(
    COMMAND "${path}" -std=c++17 -gencode arch=compute_90a,code=sm_90a -cubin -o
            "${CMAKE_CURRENT_BINARY_DIR}/probe.cubin" "${nvcc_probe_source}"
    OUTPUT_VARIABLE said
    ERROR_VARIABLE said_err
    RESULT_VARIABLE failed)
  if(failed)
    string(STRIP "${said_err}${said}" said)
    string(REGEX REPLACE "[\r\n;]+" " | " said "${said}")
    string(SUBSTRING "${said}" 0 300 said)
    set(${why_out} "${path} cannot compile for sm_90a: ${said}" PARENT_SCOPE)
    return()
  endif()
  set(${version_out} "${version}" PARENT_SCOPE)
endfunction()

# Where on Python's sys.path a wheel's file lies, a list: under build isolation wheels are in an overlay,
# not in purelib.
function(flashmoe_find_in_wheels file out)
  execute_process(
    COMMAND
      "${Python_EXECUTABLE}" -c
      "import pathlib, sys; print(';'.join(str(f) for p in sys.path if (f := pathlib.Path(p or '.', sys.argv[1]).resolve()).is_file()), end='')"
      "${file}"
    OUTPUT_VARIABLE found)
  set(${out} "${found}" PARENT_SCOPE)
endfunction()

set(FLASHMOE_NVCC_VERSION "")
set(FLASHMOE_NVSHMEM_VERSION "")
set(FLASHMOE_NO_NVSHMEM_WHY "")
set(nvcc "")
if("$ENV{FLASHMOE_SKIP_CUDA}" MATCHES "^(1|true|yes|on)$")
  set(FLASHMOE_NO_CUBINS_WHY "built with FLASHMOE_SKIP_CUDA=1")
elseif(NOT device_sources)
  set(FLASHMOE_NO_CUBINS_WHY "csrc/device holds no kernel")
else()
  set(candidates "")
  find_program(path_nvcc nvcc NO_CACHE NO_CMAKE_PATH NO_CMAKE_ENVIRONMENT_PATH NO_CMAKE_SYSTEM_PATH
                              NO_CMAKE_INSTALL_PREFIX NO_PACKAGE_ROOT_PATH)
  if(path_nvcc)
    list(APPEND candidates "${path_nvcc}")
  endif()
  flashmoe_find_in_wheels(nvidia/cu13/bin/nvcc wheel_nvcc)
  list(APPEND candidates ${wheel_nvcc})
  list(REMOVE_DUPLICATES candidates)

  set(reasons "no nvcc on PATH or in the build environment")
  foreach(candidate IN LISTS candidates)
    flashmoe_try_nvcc("${candidate}" FLASHMOE_NVCC_VERSION why)
    if(FLASHMOE_NVCC_VERSION)
      set(nvcc "${candidate}")
      break()
    endif()
    list(APPEND tried "${why}")
    list(JOIN tried ", and " reasons)
  endforeach()
  if(NOT nvcc)
    set(FLASHMOE_NO_CUBINS_WHY "${reasons}")
  endif()
endif()

if(nvcc)
  message(STATUS "nvcc ${FLASHMOE_NVCC_VERSION}: ${nvcc}")
  flashmoe_find_in_wheels(nvidia/nvshmem/include/non_abi/nvshmem_version.h nvshmem_header)
  if(nvshmem_header)
    list(GET nvshmem_header 0 nvshmem_header)
    file(READ "${nvshmem_header}" said)
    foreach(part MAJOR MINOR PATCH)
      string(REGEX MATCH "NVSHMEM_VENDOR_${part}_VERSION ([0-9]+)" ignored "${said}")
      list(APPEND FLASHMOE_NVSHMEM_VERSION "${CMAKE_MATCH_1}")
    endforeach()
    list(JOIN FLASHMOE_NVSHMEM_VERSION "." FLASHMOE_NVSHMEM_VERSION)
    cmake_path(GET nvshmem_header PARENT_PATH nvshmem_include)
    cmake_path(GET nvshmem_include PARENT_PATH nvshmem_include)
    message(STATUS "NVSHMEM ${FLASHMOE_NVSHMEM_VERSION}: ${nvshmem_include}")
  else()
    set(FLASHMOE_NO_NVSHMEM_WHY "no nvidia-nvshmem-cu13 in the build environment")
    list(FILTER device_sources EXCLUDE REGEX "_nvshmem_")
    if("$ENV{FLASHMOE_REQUIRE_CUDA}" MATCHES "^(1|true|yes|on)$")
      message(FATAL_ERROR "FLASHMOE_REQUIRE_CUDA is set, and the flavour nvshmem cannot be built: "
                          "${FLASHMOE_NO_NVSHMEM_WHY}")
    endif()
    message(STATUS "No cubin of the flavour nvshmem: ${FLASHMOE_NO_NVSHMEM_WHY}")
  endif()
  set(cubin_dir "${CMAKE_CURRENT_BINARY_DIR}/cubin")
  file(MAKE_DIRECTORY "${cubin_dir}")
  foreach(source IN LISTS device_sources)
    get_filename_component(name "${source}" NAME_WE)
    set(cubin "${cubin_dir}/${name}.cubin")
    set(includes "-I${CMAKE_CURRENT_SOURCE_DIR}/csrc")
    set(version "nvcc ${FLASHMOE_NVCC_VERSION}")
    if(name MATCHES "_nvshmem_")
      # Not ours, so its warnings are not either.
      list(APPEND includes "-isystem=${nvshmem_include}")
      string(APPEND version " NVSHMEM ${FLASHMOE_NVSHMEM_VERSION}")
    endif()
    add_custom_command(
      OUTPUT "${cubin}"
      COMMAND
        "${CMAKE_COMMAND}" "-DNVCC=${nvcc}" "-DVERSION=${version}" "-DSOURCE=${source}" "-DCUBIN=${cubin}"
        "-DINCLUDES=${includes}" "-DFLAGS=$<$<BOOL:${FLASHMOE_LINEINFO}>:-lineinfo>"
        -P "${CMAKE_CURRENT_SOURCE_DIR}/cmake/compile_cubin.cmake"
      DEPENDS "${source}" "${CMAKE_CURRENT_SOURCE_DIR}/cmake/compile_cubin.cmake"
      DEPFILE "${cubin}.d"
      COMMENT "nvcc ${name}.cubin"
      VERBATIM)
    list(APPEND FLASHMOE_CUBINS "${cubin}")
  endforeach()
  add_custom_target(cubins ALL DEPENDS ${FLASHMOE_CUBINS})
  install(FILES ${FLASHMOE_CUBINS} DESTINATION flashmoe/kernels/cubin)
endif()
