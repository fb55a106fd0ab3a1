"""A cascade of OpenCV whose finds are known without any data."""

#: One stage, one feature: the middle ninth of the window is brighter than the eight around it.
BRIGHT = b"""<?xml version="1.0"?>
<opencv_storage><cascade>
  <stageType>BOOST</stageType><featureType>LBP</featureType><height>24</height><width>24</width>
  <stageParams><maxWeakCount>1</maxWeakCount></stageParams>
  <featureParams><maxCatCount>256</maxCatCount></featureParams>
  <stageNum>1</stageNum>
  <stages><_><maxWeakCount>1</maxWeakCount><stageThreshold>0.5</stageThreshold><weakClassifiers><_>
    <internalNodes>0 -1 0 1 0 0 0 0 0 0 0</internalNodes><leafValues>1. -1.</leafValues>
  </_></weakClassifiers></_></stages>
  <features><_><rect>0 0 8 8</rect></_></features>
</cascade></opencv_storage>
"""
