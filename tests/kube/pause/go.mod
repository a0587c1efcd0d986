module nodemesh/pause

go 1.22
