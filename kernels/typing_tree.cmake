# build/typing/dqrm: every module where it will be installed, as links, with the generated stub.
# `cd build/typing && mypy dqrm tests` then sees what an import sees.
get_filename_component(root ${CMAKE_CURRENT_SOURCE_DIR}/.. ABSOLUTE)
set(tree ${root}/build/typing)
file(REMOVE_RECURSE ${tree})
file(MAKE_DIRECTORY ${tree}/dqrm/kernels)

function(link_entries folder target)
  file(GLOB entries RELATIVE ${folder} ${folder}/*)
  foreach(entry IN LISTS entries)
    if(NOT entry MATCHES "^(__pycache__|native|CMakeLists\\.txt|.*\\.cmake)$")
      file(CREATE_LINK ${folder}/${entry} ${target}/${entry} SYMBOLIC)
    endif()
  endforeach()
endfunction()

link_entries(${root}/dqrm ${tree}/dqrm)
link_entries(${root}/kernels ${tree}/dqrm/kernels)
foreach(part comm data pipelines)
  file(CREATE_LINK ${root}/${part} ${tree}/dqrm/${part} SYMBOLIC)
endforeach()
file(CREATE_LINK ${root}/tests ${tree}/tests SYMBOLIC)
file(CREATE_LINK ${CMAKE_CURRENT_BINARY_DIR}/_native.pyi ${tree}/dqrm/kernels/_native.pyi SYMBOLIC)
