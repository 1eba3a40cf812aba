# flashmoe._host: the host engine as a nanobind module.
enable_language(CXX)
find_package(Threads REQUIRED)
find_package(Python 3.11 COMPONENTS Interpreter Development.Module REQUIRED)

# A wheel's build finds nanobind on CMAKE_PREFIX_PATH; a developer's tree asks the interpreter.
if(NOT nanobind_ROOT)
  execute_process(
    COMMAND "${Python_EXECUTABLE}" -m nanobind --cmake_dir
    OUTPUT_STRIP_TRAILING_WHITESPACE ERROR_QUIET
    OUTPUT_VARIABLE nanobind_ROOT)
endif()
find_package(nanobind CONFIG REQUIRED)

file(GLOB host_sources CONFIGURE_DEPENDS "${CMAKE_CURRENT_SOURCE_DIR}/csrc/host/*.cpp"
     "${CMAKE_CURRENT_SOURCE_DIR}/csrc/bind/*.cpp")
# driver.cpp is the sanitizers' own program (`make sanitize`).
list(FILTER host_sources EXCLUDE REGEX "/host/driver\\.cpp$")

if(host_sources)
  nanobind_add_module(_host NB_STATIC ${host_sources})
  target_include_directories(_host PRIVATE "${CMAKE_CURRENT_SOURCE_DIR}/csrc")
  target_compile_features(_host PRIVATE cxx_std_20)
  target_compile_options(_host PRIVATE -O3 -Wall -Wextra)
  # A fixed order of float operations is part of the protocol (bitwise equal for every world size).
  target_compile_options(_host PRIVATE -ffp-contract=off)
  target_link_libraries(_host PRIVATE Threads::Threads)
  install(TARGETS _host LIBRARY DESTINATION flashmoe)
else()
  set(FLASHMOE_NO_HOST_WHY "csrc/bind holds no source")
  message(STATUS "No host engine: ${FLASHMOE_NO_HOST_WHY}")
endif()
