"""The protocol: whatever edge and hub must understand identically, and nothing else.

What belongs here passes one question: would a third implementation, in another language,
have to agree on this?

    tensors.py         numpy and the wire: datatypes, byte order, limits
    errors.py          what may go wrong with a request, named by what its caller does next
    inference.py       Open Inference requests, responses; encode and decode; no transport
    model_config.py    how a model is served; config.pbtxt
    statistics.py      what a model has done
    repository.py      what could be served, and asking for it
    classification.py  an output as its best classes
    shared_memory.py   tensors in memory that callers on this machine lend
    examples.py        what may be kept of an escalation, and what the edge had said
    settings.py        what a server traces and logs, asked for and changed by callers
    doors.py           what both doors do with a request, and offer beside inference
    known_messages.py  quick ways through requests and answers that look like earlier ones
    outcomes.py        how each request ended, as its caller saw it, told once
    grpc_calls.py      calls and streams over bytes, errors translated
    grpc_service.py    serves any InferenceServer over gRPC
    grpc_transport.py  the two ways to carry those calls: grpcio_door.py, and our own:
    grpc_door.py         who is let in, and the end; grpc_connection.py: calls, tasks, time
    grpc_messages.py     messages in bodies, packed or not
    grpc_headers.py      gRPC in the headers of HTTP/2; lingering.py: the end of a connection
    http2.py             one connection of HTTP/2, pure; its http2_frames.py, header_blocks.py
    door_memory.py     what all callers can make the doors hold; rooms.py: who has it when
    rest_codec.py      requests and responses as JSON and raw bytes
    big_json.py        large JSON in pieces, so that others are answered meanwhile
    rest_service.py    serves any InferenceServer over HTTP; rest_bodies.py: bodies and their memory
    client.py          asks any Open Inference server
    release.py         the bundle: what a model release consists of, read and verified
    certificate.py     the risk certificate: a threshold and the bound that holds at it
    golden.py          the self-test of a release: its vectors and the verdict
    score.py           the scale that thresholds live on
    answers.py         what a model's answers are, and which of them count
    hardware.py        the hardware class: what measurements and certificates are keyed by
    release_index.py   what the hub signs of a release: every file with its blocks
    topics.py          what is said under which MQTT topic, and by whom
    mqtt.py            the one MQTT adapter; mqtt_wire.py: one connection of it, through paho
    documents.py       canonical JSON and digests
    v1/                generated from protos/fogline/v1, never edited
"""
